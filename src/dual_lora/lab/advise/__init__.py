"""Should I use Dual LoRA here? A small paired study on the user's own data, and what follows from it."""
