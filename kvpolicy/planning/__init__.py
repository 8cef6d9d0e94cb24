"""What a recipe will take and do, before it runs."""
