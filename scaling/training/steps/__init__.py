"""How the steps of a fit on random rays are taken: by autograd, by its CUDA graph, or by compiled loops on a CPU."""
