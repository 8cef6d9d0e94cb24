"""What a plugin may be: the base classes of policies and quantizers, and the checks that they pass."""
