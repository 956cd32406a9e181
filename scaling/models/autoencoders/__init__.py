"""Image autoencoders behind one interface: what planes encode, and how pixels come of what they render.

`super_resolution`: a small image and a decoder of it; pixels themselves are its simplest case. `kl` and `tiny`: learned
latents by diffusers' AutoencoderKL and AutoencoderTiny. A file for each kind; `base` is the interface.
"""
