//! Under systemd: the sockets that it holds open for us, and what it is told. Elsewhere all of this is nothing.

use std::net::SocketAddr;
use std::time::Duration;

use listenfd::ListenFd;
use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Listeners that were handed down, to be taken by their addresses.
pub struct Inherited(Vec<std::net::TcpListener>);

impl Inherited {
    pub fn take() -> anyhow::Result<Self> {
        let mut handed_down = ListenFd::from_env();
        let mut listeners = Vec::new();
        for index in 0..handed_down.len() {
            if let Some(listener) = handed_down.take_tcp_listener(index)? {
                // Processes that we start are not to have it.
                rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::CLOEXEC)?;
                listener.set_nonblocking(true)?;
                listeners.push(listener);
            }
        }
        Ok(Self(listeners))
    }

    /// The one that is bound to this address.
    pub fn of(&mut self, address: SocketAddr) -> anyhow::Result<Option<TcpListener>> {
        let is_wanted =
            |one: &std::net::TcpListener| one.local_addr().is_ok_and(|own| own == address);
        let Some(index) = self.0.iter().position(is_wanted) else {
            return Ok(None);
        };
        Ok(Some(TcpListener::from_std(self.0.swap_remove(index))?))
    }

    /// A socket that nobody listens on would let its callers wait for ever.
    pub fn all_taken(&self) -> anyhow::Result<()> {
        if let Some(left) = self.0.first() {
            anyhow::bail!(
                "systemd holds {} open, which is neither `listen` nor `webhook_listen` of agent.yaml: change the socket unit or agent.yaml",
                left.local_addr()?
            );
        }
        Ok(())
    }
}

/// Says that we serve, and then as often as it asks that we live, until `shutdown` fires.
pub async fn tell(shutdown: CancellationToken) {
    let said = |state: NotifyState<'_>| {
        if let Err(error) = sd_notify::notify(&[state]) {
            tracing::warn!(%error, "cannot tell systemd");
        }
    };
    said(NotifyState::Ready);
    let every = sd_notify::watchdog_enabled().map_or(Duration::MAX, |limit| limit / 3);
    while tokio::time::timeout(every, shutdown.cancelled())
        .await
        .is_err()
    {
        said(NotifyState::Watchdog);
    }
    said(NotifyState::Stopping);
}
