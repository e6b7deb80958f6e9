"""The GPU side: compiling kernels/, launching them, and the device libraries that do it.

`compile` turns sources into device code, `kernels` knows every kernel's launch geometry, arguments and buffers, and
`device` adapts a device library. Importing any of them needs NumPy only.
"""
