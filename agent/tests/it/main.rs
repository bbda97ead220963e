//! Landfall from outside, on real Docker, a real cluster and real git. `make test` sets up what these need.

mod checkout;
mod checkout_ssh;
mod git_server;
mod git_world;
mod post_receive;
mod support;
