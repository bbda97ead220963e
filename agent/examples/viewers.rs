//! The viewers of `make bench`: thousands who watch one live log. Prints one line of JSON: how many saw every line once.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// Watches the live log of a build over many connections, from its first line to its end.
#[derive(Parser)]
struct Arguments {
    /// Where the server listens.
    #[arg(long)]
    address: SocketAddr,
    #[arg(long)]
    build: u64,
    #[arg(long, default_value_t = 10_000)]
    viewers: usize,
}

/// For the end of the build.
const SILENCE_MAX: Duration = Duration::from_secs(120);
/// So many connections at a time are opened: the queue of those that are not accepted yet is short.
const OPENED_AT_ONCE: usize = 100;

/// What one viewer saw.
#[derive(Default)]
struct Seen {
    lines: u64,
    gaps: u64,
    doubles: u64,
    has_ended: bool,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let mut viewers = JoinSet::new();
    for number in 0..arguments.viewers {
        let stream = TcpStream::connect(arguments.address).await;
        let stream = stream.with_context(|| format!("viewer {number} cannot connect"))?;
        viewers.spawn(watch(stream, arguments.build));
        if number % OPENED_AT_ONCE == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    eprintln!("{} watch", arguments.viewers);
    let (mut complete, mut gaps, mut doubles, mut longest, mut errors) = (0, 0, 0, 0, 0);
    while let Some(seen) = viewers.join_next().await {
        match seen? {
            Ok(seen) => {
                complete += u64::from(seen.has_ended);
                gaps += seen.gaps;
                doubles += seen.doubles;
                longest = longest.max(seen.lines);
            }
            Err(error) => {
                errors += 1;
                if errors == 1 {
                    eprintln!("{error:#}");
                }
            }
        }
    }
    println!(
        "{}",
        json!({"viewers": arguments.viewers, "complete": complete, "lines": longest, "gaps": gaps, "doubles": doubles, "errors": errors})
    );
    Ok(())
}

async fn watch(mut stream: TcpStream, build: u64) -> anyhow::Result<Seen> {
    let request = format!("GET /api/builds/{build}/log/live HTTP/1.1\r\nhost: localhost\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let (mut seen, mut buffer, mut read) = (Seen::default(), Vec::new(), [0; 4096]);
    while !seen.has_ended {
        let count = tokio::time::timeout(SILENCE_MAX, stream.read(&mut read)).await??;
        anyhow::ensure!(
            count > 0,
            "the connection was closed after line {}",
            seen.lines
        );
        buffer.extend_from_slice(&read[..count]);
        let whole = buffer
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |at| at + 1);
        for line in buffer
            .drain(..whole)
            .collect::<Vec<_>>()
            .split(|byte| *byte == b'\n')
        {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            if line.starts_with(b"HTTP/1.1 ") {
                anyhow::ensure!(
                    line.starts_with(b"HTTP/1.1 200"),
                    "{}",
                    String::from_utf8_lossy(line)
                );
            } else if let Some(number) = line.strip_prefix(b"id: ") {
                let number: u64 = std::str::from_utf8(number)?.trim().parse()?;
                seen.gaps += u64::from(number > seen.lines + 1);
                seen.doubles += u64::from(number <= seen.lines);
                seen.lines = seen.lines.max(number);
            } else if line == b"event: end" {
                seen.has_ended = true;
            }
        }
    }
    Ok(seen)
}
