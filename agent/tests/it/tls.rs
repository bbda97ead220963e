//! TLS before a plain server, by a certificate of the test's own.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use crate::landfall::free_port;

pub struct Certificate {
    key: PathBuf,
    /// PEM; it is its own authority.
    pub file: PathBuf,
}

impl Certificate {
    pub fn make(folder: &Path, names: &[&str]) -> Self {
        let made = Self {
            key: folder.join("tls.key"),
            file: folder.join("tls.pem"),
        };
        let names: Vec<String> = names.iter().map(|name| format!("DNS:{name}")).collect();
        let output = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days"])
            .args(["1", "-subj", "/CN=localhost", "-addext"])
            .args(["basicConstraints=critical,CA:FALSE", "-addext"])
            .arg(format!("subjectAltName={}", names.join(",")))
            .arg("-keyout")
            .arg(&made.key)
            .arg("-out")
            .arg(&made.file)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        made
    }
}

/// Listens until it is dropped.
pub struct Tls {
    pub port: u16,
    socat: Child,
}

impl Tls {
    /// `server` is `127.0.0.1:PORT`.
    pub fn before(server: &str, certificate: &Certificate) -> Self {
        let port = free_port();
        let listen = format!(
            "OPENSSL-LISTEN:{port},bind=127.0.0.1,reuseaddr,fork,verify=0,cert={},key={}",
            certificate.file.display(),
            certificate.key.display()
        );
        let socat = Command::new("socat")
            .arg(listen)
            .arg(format!("TCP:{server}"))
            .spawn()
            .expect("socat is needed");
        Self { port, socat }
    }
}

impl Drop for Tls {
    fn drop(&mut self) {
        let _ = self.socat.kill();
        let _ = self.socat.wait();
    }
}
