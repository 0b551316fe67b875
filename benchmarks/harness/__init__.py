"""What every benchmark stands on: where results go, what they were measured with, and how runs go on."""
