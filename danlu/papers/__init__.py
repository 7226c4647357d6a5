"""One file a paper: its claim, reproduced in miniature."""
