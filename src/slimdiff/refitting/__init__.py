"""Parts of a refit: where outputs meet the stream, runs that skip what is final, and rows."""
