//! The build context: .dockerignore and tar.
