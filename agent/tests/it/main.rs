//! Landfall from outside, on real Docker, a real cluster and real git. `make test` sets up what these need.

mod context;
mod docker_world;
mod image;
mod registry_proxy;
mod support;
mod test_stage;
