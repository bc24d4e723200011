"""Is an answer right? Certificates, by products of autograd or by differences of the gradient."""
