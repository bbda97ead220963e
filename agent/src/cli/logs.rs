//! `landfall logs`: a build's log as it stands, or as it grows.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Args;

use super::terminal::{self, Cleaner, say};
use super::{ServerArguments, follow};
use crate::builds::Build;
use crate::client::{self, Client};

/// Print the log of a build
#[derive(Debug, Args)]
#[command(after_help = concat!("Examples:\n  landfall logs 42\n  landfall logs -f 42\n  landfall logs --raw 42 > 42.log\n\n", exit_codes!()))]
pub struct Arguments {
    /// Number of a build
    #[arg(value_name = "BUILD", value_parser = super::build_number)]
    build: i64,
    /// Follow it until the build has ended, and end with its exit code
    #[arg(short, long)]
    follow: bool,
    /// The exact bytes: also those escapes that can do harm to a terminal
    #[arg(long, conflicts_with = "follow")]
    raw: bool,
    #[command(flatten)]
    server: ServerArguments,
}

pub async fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let client = arguments.server.client()?;
    if arguments.follow {
        return follow::follow(&client, &[arguments.build]).await;
    }
    print(&client, arguments).await?;
    let build: Build = client::read(&client.build(arguments.build).await?)?;
    if !build.status.is_terminal() {
        say!(
            "build #{0} goes on: `landfall logs -f {0}` follows it",
            build.id
        );
    }
    Ok(ExitCode::SUCCESS)
}

async fn print(client: &Client, arguments: &Arguments) -> anyhow::Result<()> {
    let mut log = client.log(arguments.build).await?;
    let mut cleaner = Cleaner::new(terminal::colors());
    let mut rest = Vec::new();
    while let Some(piece) = client.piece(&mut log).await? {
        if arguments.raw {
            io::stdout().write_all(&piece)?;
            continue;
        }
        rest.extend_from_slice(&piece);
        let whole = rest.len() - unfinished(&rest);
        let text = String::from_utf8_lossy(rest.get(..whole).unwrap_or_default()).into_owned();
        rest.drain(..whole);
        terminal::print(&cleaner.clean(&text))?;
    }
    if arguments.raw {
        return Ok(io::stdout().flush()?);
    }
    let text = cleaner.clean(&String::from_utf8_lossy(&rest));
    Ok(terminal::print(&(text + cleaner.end()))?)
}

/// How many bytes at the end begin a character that is not all there.
fn unfinished(bytes: &[u8]) -> usize {
    let tail = bytes.iter().rev().take(3);
    let Some((behind, first)) = tail
        .enumerate()
        .find(|(_, byte)| **byte & 0b1100_0000 != 0b1000_0000)
    else {
        return 0;
    };
    let length = match first {
        0xc2..=0xdf => 2,
        0xe0..=0xef => 3,
        0xf0..=0xf4 => 4,
        _ => 1,
    };
    if length > behind + 1 { behind + 1 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_character_is_never_cut_in_two() {
        let text = "aü€🚀b".as_bytes();
        for at in 0..=text.len() {
            let whole = at - unfinished(&text[..at]);
            assert!(std::str::from_utf8(&text[..whole]).is_ok(), "{at}");
            assert!(at - whole < 4);
        }
        assert_eq!(unfinished(b"\xff"), 0);
        assert_eq!(unfinished(b"\x80\x80\x80\x80"), 0);
    }
}
