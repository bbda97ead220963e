//! Image: build and push.
