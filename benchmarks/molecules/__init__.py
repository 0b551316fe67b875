"""What is simulated, beside what OpenMM simulates by itself."""
