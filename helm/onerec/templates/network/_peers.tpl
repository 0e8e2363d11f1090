{{/* Pods of this release, of some components, in the namespace they run in: {root, components}. */}}
{{- define "onerec.peer" -}}
- podSelector:
    matchLabels:
      app.kubernetes.io/name: {{ include "onerec.name" .root }}
      app.kubernetes.io/instance: {{ .root.Release.Name }}
    matchExpressions:
      - {key: app.kubernetes.io/component, operator: In, values: {{ .components | toJson }}}
  {{- with .namespace }}
  namespaceSelector:
    matchLabels: {kubernetes.io/metadata.name: {{ . }}}
  {{- end }}
{{- end -}}

{{/* All pods of some namespaces. */}}
{{- define "onerec.peer.namespaces" -}}
- namespaceSelector:
    matchExpressions:
      - {key: kubernetes.io/metadata.name, operator: In, values: {{ . | toJson }}}
{{- end -}}

{{/* The kubelet's own address is exempt everywhere; names must resolve. */}}
{{- define "onerec.egress.dns" -}}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- end -}}

{{- define "onerec.egress.objectStore" -}}
- ports:
    - {port: {{ include "onerec.objectStore.port" . }}, protocol: TCP}
  {{- if .Values.seaweedfs.enabled }}
  to:
    {{- include "onerec.peer" (dict "root" . "components" (list "seaweedfs") "namespace" .Release.Namespace) | nindent 4 }}
  {{- else if .Values.networkPolicy.objectStorePeers }}
  to:
    {{- toYaml .Values.networkPolicy.objectStorePeers | nindent 4 }}
  {{- end }}
{{- end -}}

{{- define "onerec.egress.redis" -}}
- ports:
    - {port: {{ include "onerec.redis.port" . }}, protocol: TCP}
  {{- if .Values.valkey.enabled }}
  to:
    {{- include "onerec.peer" (dict "root" . "components" (list "valkey") "namespace" .Release.Namespace) | nindent 4 }}
  {{- else if .Values.networkPolicy.redisPeers }}
  to:
    {{- toYaml .Values.networkPolicy.redisPeers | nindent 4 }}
  {{- end }}
{{- end -}}

{{- define "onerec.egress.collector" -}}
- ports:
    - {port: 8000, protocol: TCP}
  to:
    {{- include "onerec.peer" (dict "root" . "components" (list "collector")) | nindent 4 }}
{{- end -}}

{{/* Prometheus: {root, port}. */}}
{{- define "onerec.ingress.monitoring" -}}
{{- with .root.Values.networkPolicy.monitoringNamespaces -}}
- ports:
    - {port: {{ $.port }}, protocol: TCP}
  from:
    {{- include "onerec.peer.namespaces" . | nindent 4 }}
{{- end }}
{{- end -}}

{{/* Head of the policy of one component: {root, component, namespace}. */}}
{{- define "onerec.policy" -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ include "onerec.fullname" .root }}-{{ .component }}
  {{- with .namespace }}
  namespace: {{ . }}
  {{- end }}
  labels:
    {{- include "onerec.labels" . | nindent 4 }}
spec:
  podSelector:
    matchLabels:
      {{- include "onerec.selector" . | nindent 6 }}
  policyTypes: [Ingress, Egress]
{{- end -}}
