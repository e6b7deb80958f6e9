"""Engine files and the libraries that build and run them."""
