"""Convert a YOLOv5 checkpoint to .wts or .safetensors: see `python gen_wts.py --help`."""

import sys

from yolotrt.weights.gen_wts import main

if __name__ == "__main__":
    sys.exit(main())
