//! Simulation of the data paths against fakes.
