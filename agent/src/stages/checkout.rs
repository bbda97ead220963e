//! Checkout: the mirror, the commit, the tree.
