"""Generation: sampling, streaming, beam search, states that are saved and forked."""
