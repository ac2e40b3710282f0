"""Data: documents → tokenizer → shards (tar files and an index) → an order that is a function of seed and step."""
