//! The command line: words to command, and nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(landfall::git_process::SUBCOMMAND) {
        return landfall::git_child::main_in_child();
    }
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .init();
    let path = std::env::args().nth(3).unwrap_or_default();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("runtime");
    runtime
        .block_on(landfall::cli::serve::run(path.as_ref()))
        .unwrap_or(ExitCode::FAILURE)
}
