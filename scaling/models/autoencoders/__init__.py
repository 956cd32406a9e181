"""Image autoencoders behind one interface: they encode images to latents for planes, and decode rendered latents.

`super_resolution`: the latent is a smaller image, which a decoder enlarges; pixels themselves are its simplest case.
`kl` and `tiny`: learned latents of diffusers' AutoencoderKL and AutoencoderTiny. Each kind has a file; `base` is the
interface.
"""
