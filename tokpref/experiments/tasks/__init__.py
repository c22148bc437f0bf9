"""What is compared on."""
