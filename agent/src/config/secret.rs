//! A secret of agent.yaml, or of the environment.

use std::path::{Path, PathBuf};

use anyhow::Context;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

/// A secret: the text itself, or the file that holds it. Never printed, never serialised.
#[derive(Debug, Clone, Deserialize)]
#[serde(from = "SecretAsWritten")]
pub enum Secret {
    Text(SecretString),
    /// Read when the configuration is loaded.
    File(PathBuf),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum SecretAsWritten {
    Text(String),
    File { file: PathBuf },
}

impl From<SecretAsWritten> for Secret {
    fn from(written: SecretAsWritten) -> Self {
        match written {
            SecretAsWritten::Text(text) => Self::Text(SecretString::from(text)),
            SecretAsWritten::File { file } => Self::File(file),
        }
    }
}

impl Secret {
    pub fn expose(&self) -> &str {
        match self {
            Self::Text(text) => text.expose_secret(),
            Self::File(_) => {
                unreachable!("secret files are read when the configuration is loaded")
            }
        }
    }

    pub(super) fn read(&mut self, base: &Path) -> anyhow::Result<()> {
        if let Self::File(file) = self {
            *self = Self::from_file(&base.join(&*file))?;
        }
        Ok(())
    }

    pub(super) fn from_file(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the secret file {}", path.display()))?;
        let text = text.trim_end_matches(['\n', '\r']);
        anyhow::ensure!(
            !text.trim().is_empty(),
            "the secret file {} is empty",
            path.display()
        );
        Ok(Self::Text(SecretString::from(text)))
    }
}
