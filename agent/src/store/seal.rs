//! What the store holds of Secret manifests: sealed, so that a copy of the database gives no password away.
//!
//! AES-256-GCM with a key of its own in the data folder (`seal-key`, mode 0600), made when the store is opened first. Each
//! seal is bound to its object, so that two cannot be exchanged.

use std::path::Path;

use anyhow::{Context, anyhow, ensure};
use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::own_secret;

pub(super) const KEY_FILE: &str = "seal-key";
const KEY_BYTES: usize = 32;
/// Stands in the place of `data` and `stringData`.
pub(super) const SEALED: &str = "landfall.dev/sealed";
const CONTENTS: [&str; 2] = ["data", "stringData"];

/// A release's Secrets cannot be read: the key is another one. No retry helps.
#[derive(Debug)]
pub struct Unsealable(String);

impl std::fmt::Display for Unsealable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unsealable {}

pub(super) struct Seal {
    key: RandomizedNonceKey,
    /// It was made just now.
    pub is_new: bool,
    /// Where the key is, for errors.
    path: String,
}

impl Seal {
    /// Reads the key of this data folder, or makes it.
    pub fn open(data_dir: &Path) -> anyhow::Result<Self> {
        let path = data_dir.join(KEY_FILE);
        let is_new = !path.exists();
        let key = hex::decode(own_secret::read_or_make(&path)?).unwrap_or_default();
        let path = path.display().to_string();
        ensure!(
            key.len() == KEY_BYTES,
            "{path} holds no key of {KEY_BYTES} bytes: restore it from a backup (without it the Secrets of earlier releases cannot be put back)"
        );
        let key = RandomizedNonceKey::new(&AES_256_GCM, &key)
            .map_err(|_| anyhow!("{path} is no usable key"))?;
        Ok(Self { key, is_new, path })
    }

    /// Seals the content of every Secret among these objects.
    pub fn close(&self, objects: &mut [Value]) -> anyhow::Result<()> {
        for object in objects.iter_mut().filter(|object| is_secret(object)) {
            let bound_to = bound_to(object);
            let Some(members) = object.as_object_mut() else {
                continue;
            };
            let content: serde_json::Map<String, Value> = CONTENTS
                .iter()
                .filter_map(|name| Some(((*name).to_owned(), members.remove(*name)?)))
                .collect();
            let mut bytes = serde_json::to_vec(&content)?;
            let nonce = self
                .key
                .seal_in_place_append_tag(Aad::from(bound_to.as_bytes()), &mut bytes)
                .map_err(|_| anyhow!("cannot seal {bound_to}"))?;
            let sealed = STANDARD.encode([nonce.as_ref().as_slice(), &bytes].concat());
            members.insert("data".to_owned(), json!({SEALED: sealed}));
        }
        Ok(())
    }

    /// Opens what `close` has sealed; what is not sealed stays as it is.
    pub fn reopen(&self, objects: &mut [Value]) -> anyhow::Result<()> {
        for object in objects.iter_mut().filter(|object| is_secret(object)) {
            let bound_to = bound_to(object);
            let Some(members) = object.as_object_mut() else {
                continue;
            };
            let Some(sealed) = members.get("data").and_then(|data| data.get(SEALED)) else {
                continue;
            };
            let sealed = STANDARD.decode(sealed.as_str().unwrap_or_default())?;
            let content = self.unsealed(&sealed, &bound_to).map_err(|error| {
                Unsealable(format!(
                    "{bound_to} was sealed with another key than that of {} ({error:#})",
                    self.path
                ))
            })?;
            members.remove("data");
            members.extend(content);
        }
        Ok(())
    }

    fn unsealed(
        &self,
        sealed: &[u8],
        bound_to: &str,
    ) -> anyhow::Result<serde_json::Map<String, Value>> {
        let (nonce, bytes) = sealed
            .split_at_checked(NONCE_LEN)
            .context("a seal is too short")?;
        let nonce =
            Nonce::try_assume_unique_for_key(nonce).map_err(|_| anyhow!("a seal is cut"))?;
        let mut bytes = bytes.to_vec();
        let content = self
            .key
            .open_in_place(nonce, Aad::from(bound_to.as_bytes()), &mut bytes)
            .map_err(|_| anyhow!("it cannot be opened"))?;
        Ok(serde_json::from_slice(content)?)
    }
}

fn is_secret(object: &Value) -> bool {
    object["kind"] == "Secret"
}

fn bound_to(object: &Value) -> String {
    let text = |name: &str| object["metadata"][name].as_str().unwrap_or_default();
    format!("secret/{} of namespace {}", text("name"), text("namespace"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objects() -> Vec<Value> {
        let secret = |name: &str| json!({"kind": "Secret", "metadata": {"name": name, "namespace": "n"}, "data": {"password": "aHVudGVyMg=="}, "stringData": {"b": "c"}});
        vec![
            secret("a"),
            json!({"kind": "ConfigMap", "data": {"k": "v"}}),
            secret("b"),
        ]
    }

    #[test]
    fn what_is_sealed_comes_back_and_only_with_its_key_and_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let seal = Seal::open(folder.path()).unwrap();
        let mut sealed = objects();
        seal.close(&mut sealed).unwrap();
        let text = Value::from(sealed.clone()).to_string();
        assert!(
            !text.contains("aHVudGVyMg") && !text.contains("stringData"),
            "{text}"
        );
        assert_eq!(sealed[1], objects()[1]);

        // Another start of the agent has the same key.
        let mut again = sealed.clone();
        Seal::open(folder.path())
            .unwrap()
            .reopen(&mut again)
            .unwrap();
        assert_eq!(again, objects());
        // What was stored before there were seals is read as it is.
        seal.reopen(&mut again).unwrap();
        assert_eq!(again, objects());

        let mut exchanged = sealed.clone();
        exchanged[0]["metadata"]["name"] = json!("b");
        assert!(seal.reopen(&mut exchanged).is_err());
        let other = tempfile::tempdir().unwrap();
        let error = Seal::open(other.path())
            .unwrap()
            .reopen(&mut sealed)
            .unwrap_err();
        assert!(
            error.to_string().contains("sealed with another key"),
            "{error:#}"
        );
        assert!(
            error.is::<Unsealable>(),
            "no retry helps, and callers must know"
        );
    }

    #[test]
    fn a_key_that_is_none_is_told() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        Seal::open(folder.path()).unwrap();
        let path = folder.path().join("seal-key");
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        std::fs::write(&path, "abc").unwrap();
        let error = Seal::open(folder.path()).err().unwrap();
        assert!(
            error.to_string().contains("restore it from a backup"),
            "{error:#}"
        );
    }

    #[tokio::test]
    async fn a_missing_key_is_not_made_anew_where_something_is_sealed() {
        use crate::store::{Store, dialect::on};
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), None).await.unwrap();
        on!(&store.main, pool => sqlx::query(
                "INSERT INTO releases (id, environment, build_id, commit_id, image, set_hash, body, state, planned_at) \
                 VALUES (1, 'hello', 1, 'c', 'i', 'h', '{\"landfall.dev/sealed\": \"\"}', 'live', 0)")
            .execute(pool).await.unwrap().rows_affected());
        drop(store);
        let key = folder.path().join(KEY_FILE);
        let there = std::fs::read(&key).unwrap();
        std::fs::remove_file(&key).unwrap();
        for _ in 0..2 {
            let Err(error) = Store::open(folder.path(), None).await else {
                panic!("a store was opened whose Secrets cannot be read")
            };
            assert!(
                error.to_string().contains("is missing: restore it"),
                "{error:#}"
            );
            assert!(!key.exists());
        }
        std::fs::write(&key, there).unwrap();
        Store::open(folder.path(), None).await.unwrap();
    }
}
