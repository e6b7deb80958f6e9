"""YoloLayer inside a TensorRT engine.

`yololayer` adds it to a network as an ahead-of-time Python plugin, whose device code TensorRT stores in the engine.
Importing it needs NumPy only; the plugin is registered with TensorRT when it is first added to a network.
"""
