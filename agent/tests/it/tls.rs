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
        let alternative = |name: &&str| match name.parse::<std::net::IpAddr>() {
            Ok(address) => format!("IP:{address}"),
            Err(_) => format!("DNS:{name}"),
        };
        let names: Vec<String> = names.iter().map(alternative).collect();
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
        Self::at("127.0.0.1", server, certificate)
    }

    /// Listens on this address of the machine.
    pub fn at(address: &str, server: &str, certificate: &Certificate) -> Self {
        let port = free_port();
        let listen = format!(
            "OPENSSL-LISTEN:{port},bind={address},reuseaddr,fork,verify=0,cert={},key={}",
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
