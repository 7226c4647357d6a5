"""Tokenizers, chat rendering, token shards and the packing loader."""
