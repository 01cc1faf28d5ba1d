"""The simulator as a rival: bodies, velocities and laws read off the condition frames, simulated on and drawn."""
