"""What a model is worth: bits per byte, compression, chat quality."""
