//! Manifests: YAML by the rules of kubectl, rendered for one release.
