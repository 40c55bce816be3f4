"""What a finished run is worth: metrics with intervals, perplexity, and the files that say so."""
