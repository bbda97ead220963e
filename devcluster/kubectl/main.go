// Kubectl as it is published, from the same module as the cluster. A program of its own, for it is started thousands of
// times: as one more name of kubeall it would set up a whole Kubernetes before it says a word.
package main

import (
	"k8s.io/component-base/cli"
	"k8s.io/kubectl/pkg/cmd"
	"k8s.io/kubectl/pkg/cmd/util"
)

func main() {
	util.CheckErr(cli.RunNoErrOutput(cmd.NewDefaultKubectlCommand()))
}
