//! The cluster: what is asked of the API server (`apply`, `observe`), and what is judged without it (`policy`, `rollout`).

pub mod diagnose;
pub mod observe;
pub mod proxy;
pub mod rollout;
pub mod snapshot;
pub mod tables;

use anyhow::Context;

use crate::config::Environment;

/// One environment's cluster and namespace.
#[derive(Clone)]
pub struct Cluster {
    pub client: kube::Client,
    pub namespace: String,
}

impl Cluster {
    /// By the environment's kubeconfig and context; without one, as kubectl would or as a pod does.
    pub async fn connect(environment: &Environment) -> anyhow::Result<Self> {
        let options = kube::config::KubeConfigOptions {
            context: environment.context.clone(),
            ..Default::default()
        };
        let mut config = match &environment.kubeconfig {
            Some(path) => {
                let kubeconfig = kube::config::Kubeconfig::read_from(path)
                    .with_context(|| format!("cannot read the kubeconfig {}", path.display()))?;
                kube::Config::from_custom_kubeconfig(kubeconfig, &options).await
            }
            None => kube::Config::from_kubeconfig(&options).await,
        }
        .context("cannot use the kubeconfig")?;
        // Whoever asks decides whether to ask again: a program's own 503 through the proxy is an answer.
        config.default_retry = false;
        let client = kube::Client::try_from(config)
            .context("cannot set up the connection to the cluster")?;
        Ok(Self {
            client,
            namespace: environment.namespace.clone(),
        })
    }
}
