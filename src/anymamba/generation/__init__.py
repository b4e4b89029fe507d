"""Generation: sampling, streaming, beam search, saving and forking states."""
