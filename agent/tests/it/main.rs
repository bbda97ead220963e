//! Landfall from outside, on real Docker, a real cluster and real git. `make test` sets up what these need.

mod support;
mod verify;
