"""fxcompress: a declarative graph-rewrite compiler for neural-network compression."""
