//! A company's way out: a proxy that wants a login and tunnels to two names, behind each a server with a certificate of the
//! company's own authority. Nobody else reaches those names.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};

use crate::tls::{Certificate, Tls};

const LOGIN: &str = "landfall:pr0xy-w0rd-of-the-company";

pub struct ForwardProxy {
    address: SocketAddr,
    pub certificate: Certificate,
    _servers: Vec<Tls>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl ForwardProxy {
    /// `names` to where the plain servers behind them listen.
    pub async fn start(folder: &Path, names: BTreeMap<&'static str, String>) -> Self {
        let known: Vec<&str> = names.keys().copied().collect();
        let certificate = Certificate::make(folder, &known);
        let (mut servers, mut ports) = (Vec::new(), BTreeMap::new());
        for (name, server) in names {
            let tls = Tls::before(&server, &certificate);
            ports.insert(name, tls.port);
            servers.push(tls);
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::default();
        let log = Arc::clone(&asked);
        let ports = Arc::new(ports);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(tunnel(stream, Arc::clone(&ports), Arc::clone(&log)));
            }
        });
        Self {
            address,
            certificate,
            _servers: servers,
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

async fn tunnel(
    stream: TcpStream,
    ports: Arc<BTreeMap<&'static str, u16>>,
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
    let answer = match (is_known, ports.get(name.as_str())) {
        (true, Some(_)) => "200 Connection established",
        (true, None) => "502 Bad Gateway",
        (false, _) => {
            "407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=\"the company\"\r\nConnection: close\r\nContent-Length: 0"
        }
    };
    stream
        .write_all(format!("HTTP/1.1 {answer}\r\n\r\n").as_bytes())
        .await?;
    let Some(port) = ports.get(name.as_str()).filter(|_| is_known) else {
        return Ok(());
    };
    asked.lock().unwrap().push(name);
    let mut server = TcpStream::connect(("127.0.0.1", *port)).await?;
    copy_bidirectional(&mut stream, &mut server).await.map(drop)
}
