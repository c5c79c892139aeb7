"""`crane verify`: prove on the hardware at hand that every request runs with exactly its mask. Imports no vLLM."""
