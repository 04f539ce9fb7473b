"""An adapter for others: its LoRA in other libraries' layouts, proved by them, and a folder for the hub."""
