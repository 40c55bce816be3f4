"""The adapters: low-rank updates of linear layers, and the PEFT folders that hold them."""
