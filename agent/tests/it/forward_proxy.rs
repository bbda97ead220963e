//! A company's way out: a proxy that wants a login and tunnels to two names, behind each a server with a certificate of the
//! company's own authority. Nobody else reaches those names.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

const LOGIN: &str = "landfall:pr0xy-w0rd-of-the-company";

pub struct ForwardProxy {
    address: SocketAddr,
    /// The company's authority, as a file of PEM.
    pub authority: PathBuf,
    asked: Arc<Mutex<Vec<String>>>,
}

impl ForwardProxy {
    /// `names` to where the plain servers behind them listen.
    pub async fn start(folder: &Path, names: BTreeMap<&'static str, String>) -> Self {
        let (authority, tls) = certificate(folder, names.keys().copied());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::default();
        let log = Arc::clone(&asked);
        let names = Arc::new(names);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(tunnel(stream, names.clone(), tls.clone(), Arc::clone(&log)));
            }
        });
        Self {
            address,
            authority,
            asked,
        }
    }

    pub fn url(&self) -> String {
        format!("http://{LOGIN}@{}", self.address)
    }

    pub fn password() -> &'static str {
        LOGIN.split_once(':').unwrap().1
    }

    /// The names that were asked for with the right login, in order.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

fn certificate(folder: &Path, names: impl Iterator<Item = &'static str>) -> (PathBuf, TlsAcceptor) {
    let names: Vec<String> = names.map(|name| format!("DNS:{name}")).collect();
    let (key, file) = (folder.join("tls.key"), folder.join("tls.pem"));
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt"])
        .args(["ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=the company", "-addext"])
        .args(["basicConstraints=critical,CA:FALSE", "-addext"])
        .arg(format!("subjectAltName={}", names.join(",")))
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&file)
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let chain = vec![CertificateDer::from_pem_file(&file).unwrap()];
    let key = PrivateKeyDer::from_pem_file(&key).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    (file, TlsAcceptor::from(Arc::new(config)))
}

async fn tunnel(
    stream: TcpStream,
    names: Arc<BTreeMap<&'static str, String>>,
    tls: TlsAcceptor,
    asked: Arc<Mutex<Vec<String>>>,
) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    let (mut name, mut is_known) = (String::new(), false);
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await?;
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        if let Some(rest) = line.strip_prefix("CONNECT ") {
            name = rest.split(':').next().unwrap().to_owned();
        }
        let login = line
            .to_lowercase()
            .strip_prefix("proxy-authorization:")
            .map(|_| line[20..].trim());
        is_known |= login == Some(format!("Basic {}", STANDARD.encode(LOGIN)).as_str());
    }
    let answer = match (is_known, names.get(name.as_str())) {
        (true, Some(_)) => "200 Connection established",
        (true, None) => "502 Bad Gateway",
        (false, _) => {
            "407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=\"the company\"\r\nConnection: close\r\nContent-Length: 0"
        }
    };
    stream
        .write_all(format!("HTTP/1.1 {answer}\r\n\r\n").as_bytes())
        .await?;
    let Some(address) = names.get(name.as_str()).filter(|_| is_known) else {
        return Ok(());
    };
    asked.lock().unwrap().push(name);
    let mut inside = tls.accept(stream).await?;
    let mut server = TcpStream::connect(address).await?;
    copy_bidirectional(&mut inside, &mut server).await.map(drop)
}
