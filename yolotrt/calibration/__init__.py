"""INT8 calibration: pictures in, a table of scales out."""
