//! Landfall from outside, on real Docker, a real cluster and real git. `make test` sets up what these need.

mod checkout;
mod checkout_ssh;
mod cli;
mod context;
mod deploy;
mod docker_world;
mod fake_agent;
mod fake_github;
mod git_server;
mod git_world;
mod github;
mod image;
mod landfall;
mod line;
mod post_receive;
mod registry_proxy;
mod sample;
mod standalone;
mod support;
mod test_stage;
mod tidy;
mod traffic;
mod transaction;
mod verify;
mod yaml;
