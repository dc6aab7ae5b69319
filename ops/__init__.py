"""Torch operators over the kernels. Import each from its own module; the package's names stand in
`onepass`."""
