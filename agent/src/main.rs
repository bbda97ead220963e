//! The command line: words to command, and nothing else.

use std::process::ExitCode;

use clap::Parser;
use landfall::cli;
use landfall::git::{child, process};

fn main() -> ExitCode {
    if std::env::args_os()
        .nth(1)
        .is_some_and(|word| word == process::SUBCOMMAND)
    {
        return child::main_in_child();
    }
    // Before any TLS: two crates of ours would each choose one, and rustls refuses to guess.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let cli = cli::Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("landfall: cannot start: {error}");
            return ExitCode::from(cli::exit::UNREACHABLE);
        }
    };
    let code = runtime.block_on(cli::run(cli));
    // A thread that reads names or files may hang for longer than anybody wants to wait.
    runtime.shutdown_background();
    code
}
