#!/bin/bash
# The node's first process: starts a whole Kubernetes and ends with the first component that ends.
# From CLUSTER_NAME and REGISTRY_PORT it makes keys (once), configuration (at each start), then the processes in order.
# /run/ready is there once this start is ready: /run is in memory, so the last start's is gone.
# It never leaves the container: pods live below the container's own cgroup, and docker rm takes all of it away.
set -euo pipefail

readonly logs=/var/log/landfall ready_seconds=120
declare -A component # pid → name

main() {
    trap 'exit 0' TERM INT # the first process ends, so all end; etcd's pages are safe in the kernel
    cd /etc/kubernetes
    mkdir -p "$logs"
    node_ip=$(hostname -i | awk '{print $1}')
    prepare_mounts
    prepare_cgroup
    [ -e keys-made ] || make_keys
    configure
    export KUBECONFIG=/etc/kubernetes/admin.conf
    start_registry_and_containerd
    start_control_plane
    start_node
    touch /run/ready
    echo "ready after ${SECONDS} s"
    local ended
    wait -n -p ended || true
    died "$ended"
}

prepare_mounts() {
    mount -o remount,rw /sys || true
    mount --make-rshared /
    [ -e /dev/kmsg ] || mknod /dev/kmsg c 1 11
}

# Sets cgroup_root: the container's own cgroup, as its processes see it.
prepare_cgroup() {
    if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
        # v2, in a cgroup namespace of our own. Only a cgroup without processes may hand controllers on.
        cgroup_root=/
        mount -o remount,rw /sys/fs/cgroup || true
        remove_cgroups /sys/fs/cgroup/kubepods
        mkdir -p /sys/fs/cgroup/node
        local pid
        for pid in $(cat /sys/fs/cgroup/cgroup.procs); do
            echo "$pid" > /sys/fs/cgroup/node/cgroup.procs 2> /dev/null || true # it may have ended
        done
        sed -E 's/[^ ]+/+&/g' /sys/fs/cgroup/cgroup.controllers > /sys/fs/cgroup/cgroup.subtree_control
    else
        # v1: the machine's tree is mounted; Docker has made our path in every controller.
        cgroup_root=$(awk -F: '$2 == "memory" {print $3}' /proc/self/cgroup)
        local controller
        for controller in /sys/fs/cgroup/*/; do
            remove_cgroups "$controller$cgroup_root/kubepods"
        done
    fi
}

# What the last start left: cAdvisor waits three seconds for each dead container's.
remove_cgroups() {
    [ ! -d "$1" ] || find "$1" -depth -type d -exec rmdir {} + 2> /dev/null || true
}

make_keys() {
    openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -days 3650 -subj "/CN=$CLUSTER_NAME" 2> /dev/null
    make_key apiserver /CN=kube-apiserver
    make_key admin /O=system:masters/CN=admin
    make_key kubelet /O=system:nodes/CN=system:node:node
    make_key front-proxy /CN=front-proxy-client
    openssl genrsa -out sa.key 2048 2> /dev/null
    make_kubeconfig admin
    make_kubeconfig kubelet
    touch keys-made
}

# make_key NAME SUBJECT
make_key() {
    openssl req -newkey rsa:2048 -nodes -keyout "$1.key" -out "$1.csr" -subj "$2" 2> /dev/null
    openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 -out "$1.crt" -extfile <(
        echo "subjectAltName=DNS:localhost,DNS:node,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,IP:127.0.0.1,IP:10.96.0.1"
    ) 2> /dev/null
}

make_kubeconfig() {
    cat > "$1.conf" << YAML
apiVersion: v1
kind: Config
clusters:
  - name: $CLUSTER_NAME
    cluster:
      server: https://127.0.0.1:6443
      certificate-authority-data: $(base64 -w0 ca.crt)
users:
  - name: $1
    user:
      client-certificate-data: $(base64 -w0 "$1.crt")
      client-key-data: $(base64 -w0 "$1.key")
contexts:
  - name: $CLUSTER_NAME
    context:
      cluster: $CLUSTER_NAME
      user: $1
current-context: $CLUSTER_NAME
YAML
}

# The container's address may be another one after a restart.
configure() {
    mkdir -p run
    sed "s|CGROUP_ROOT|$cgroup_root|" kubelet.yaml > run/kubelet.yaml
    sed "s|NODE_IP|$node_ip|" Corefile > run/Corefile
    sed "s|NODE_IP|$node_ip|" addons.yaml > run/addons.yaml
    mkdir -p "/etc/containerd/certs.d/localhost:$REGISTRY_PORT"
    echo "server = \"http://localhost:$REGISTRY_PORT\"" > "/etc/containerd/certs.d/localhost:$REGISTRY_PORT/hosts.toml"
}

start_registry_and_containerd() {
    REGISTRY_HTTP_ADDR=":$REGISTRY_PORT" start registry docker-registry serve /etc/docker/registry/config.yml
    start containerd containerd
}

start_control_plane() {
    start etcd etcd --data-dir /var/lib/etcd --unsafe-no-fsync
    start kube-apiserver kube-apiserver \
        --etcd-servers=http://127.0.0.1:2379 \
        --service-cluster-ip-range=10.96.0.0/16 \
        --tls-cert-file=apiserver.crt --tls-private-key-file=apiserver.key --client-ca-file=ca.crt \
        --service-account-issuer=https://kubernetes.default.svc \
        --service-account-key-file=sa.key --service-account-signing-key-file=sa.key \
        --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --allow-privileged=true \
        --kubelet-client-certificate=admin.crt --kubelet-client-key=admin.key \
        --requestheader-client-ca-file=ca.crt --requestheader-allowed-names=front-proxy-client \
        --requestheader-username-headers=X-Remote-User --requestheader-group-headers=X-Remote-Group \
        --requestheader-extra-headers-prefix=X-Remote-Extra- \
        --proxy-client-cert-file=front-proxy.crt --proxy-client-key-file=front-proxy.key --enable-aggregator-routing=true
    wait_for kube-apiserver kubectl get --raw /readyz
    # Only now: the controller manager gives up when the API is not there within ten seconds.
    start kube-controller-manager kube-controller-manager --kubeconfig=admin.conf --leader-elect=false \
        --service-account-private-key-file=sa.key --root-ca-file=ca.crt \
        --cluster-signing-cert-file=ca.crt --cluster-signing-key-file=ca.key \
        --cluster-cidr=10.244.0.0/16 --allocate-node-cidrs=true
    start kube-scheduler kube-scheduler --kubeconfig=admin.conf --leader-elect=false
}

start_node() {
    wait_for containerd ctr -n k8s.io image import pause.tar
    kubelet_began=$(date -u +%FT%TZ)
    start kubelet kubelet --config=run/kubelet.yaml --kubeconfig=kubelet.conf --hostname-override=node --node-ip="$node_ip"
    start kube-proxy kube-proxy --config=proxy.yaml --hostname-override=node
    start coredns coredns -conf run/Corefile
    start metrics-server metrics-server --kubeconfig=admin.conf \
        --authentication-kubeconfig=admin.conf --authorization-kubeconfig=admin.conf \
        --secure-port=10260 --cert-dir=/run/metrics-server --metric-resolution=15s \
        --kubelet-insecure-tls --kubelet-preferred-address-types=InternalIP
    wait_for kube-apiserver kubectl apply --server-side --force-conflicts -f run/addons.yaml
    wait_for kubelet node_is_ready
    wait_for kube-controller-manager kubectl get serviceaccount default # no pod can be made before it
    wait_for metrics-server kubectl get --raw /apis/metrics.k8s.io/v1beta1 # no namespace can be deleted before it
}

# After a restart the node's Ready is still the one of before, until the kubelet's first heartbeat.
node_is_ready() {
    local status heartbeat
    read -r status heartbeat < <(kubectl get node node \
        -o jsonpath='{range .status.conditions[?(@.type=="Ready")]}{.status} {.lastHeartbeatTime}{"\n"}{end}')
    [ "$status" = True ] && [[ ! "$heartbeat" < "$kubelet_began" ]]
}

# start NAME COMMAND...
start() {
    local name=$1
    shift
    "$@" > "$logs/$name.log" 2>&1 &
    component[$!]=$name
}

# wait_for NAME COMMAND...: until the command succeeds; NAME is who to blame where it never does.
wait_for() {
    local name=$1 pid
    shift
    until "$@" > /dev/null 2> /tmp/why; do
        for pid in "${!component[@]}"; do
            kill -0 "$pid" 2> /dev/null || died "$pid"
        done
        [ "$SECONDS" -lt "$ready_seconds" ] || give_up "$name" "still waiting for $name after $SECONDS s: $(tail -n 1 /tmp/why)"
        sleep 0.2
    done
}

died() { give_up "${component[$1]}" "${component[$1]} has ended"; }

# give_up NAME WHY: the end of NAME's log says more.
give_up() {
    tail -n 15 "$logs/$1.log"
    echo "$2"
    exit 1
}

main
