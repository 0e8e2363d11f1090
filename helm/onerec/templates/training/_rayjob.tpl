{{/* A Ray container: {root, resources, gpu, node}. The train image has no wget, which KubeRay's own probes call. */}}
{{- define "onerec.ray.container" -}}
{{- $alive := "import urllib.request as u; u.urlopen('http://127.0.0.1:52365/api/local_raylet_healthz', timeout=4)" -}}
- name: ray-{{ .node }}
  {{- include "onerec.container" (dict "root" .root "name" "train") | nindent 2 }}
  envFrom:
    - configMapRef:
        name: {{ include "onerec.fullname" .root }}-pipelines
    - secretRef:
        name: {{ .root.Values.pipelines.existingSecret }}
  env:
    {{- if eq .node "head" }}
    - {name: ONEREC_RAY_ADDRESS, value: "127.0.0.1:6379"}
    # Processes that train together, one a GPU.
    {{- $workers := .root.Values.training.workers }}
    - {name: ONEREC_RAY_WORKERS, value: {{ mul $workers.replicas (ternary $workers.gpu.count 1 $workers.gpu.enabled) | quote }}}
    {{- end }}
    # On what head and workers share, because training hands files over by path; Ray's own sockets must not lie there.
    - {name: TMPDIR, value: /data}
    - {name: RAY_TMPDIR, value: /tmp}
    - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
    - {name: OMP_NUM_THREADS, value: "1"}
  {{- if eq .node "head" }}
  ports:
    - {name: gcs, containerPort: 6379}
    - {name: dashboard, containerPort: 8265}
    - {name: client, containerPort: 10001}
  {{- end }}
  startupProbe:
    exec: {command: [python, -c, {{ $alive | quote }}]}
    periodSeconds: 5
    timeoutSeconds: 5
    failureThreshold: 60
  readinessProbe:
    exec: {command: [python, -c, {{ $alive | quote }}]}
    periodSeconds: 10
    timeoutSeconds: 5
  livenessProbe:
    exec: {command: [python, -c, {{ $alive | quote }}]}
    periodSeconds: 30
    timeoutSeconds: 5
    failureThreshold: 10
  resources:
    {{- include "onerec.resources" . | nindent 4 }}
  volumeMounts:
    - {name: data, mountPath: /data}
    - {name: tmp, mountPath: /tmp}
    - {name: shm, mountPath: /dev/shm}
{{- end -}}

{{/* Volumes of a Ray pod: {root, shm}. */}}
{{- define "onerec.ray.volumes" -}}
- name: data
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-training" (include "onerec.fullname" .root)) .root.Values.training.storage.existingClaim }}
- name: tmp
  emptyDir: {}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ .shm }}}
{{- end -}}

{{/* What the launcher completes: name, owner, run, entry point. */}}
{{- define "onerec.rayjob" -}}
{{- $training := .Values.training -}}
{{- $ctx := dict "root" . "component" "training" -}}
{{- $priority := dict "priorityClassName" $training.priorityClassName -}}
apiVersion: ray.io/v1
kind: RayJob
metadata:
  labels:
    {{- include "onerec.podLabels" $ctx | nindent 4 }}
    {{- with $training.queue }}
    kueue.x-k8s.io/queue-name: {{ . }}
    {{- end }}
    {{- with $training.priority }}
    kueue.x-k8s.io/priority-class: {{ . }}
    {{- end }}
spec:
  submissionMode: K8sJobMode
  # Replaced by the launcher; as it stands it tells that nobody did.
  entrypoint: python -c "raise SystemExit('this RayJob was not made by the launcher')"
  # What Kueue and the budget want: the cluster goes when the job is done.
  shutdownAfterJobFinishes: true
  ttlSecondsAfterFinished: {{ mul $training.keepHours 3600 }}
  activeDeadlineSeconds: {{ mul $training.deadlineHours 3600 }}
  backoffLimit: {{ $training.backoffLimit }}
  submitterPodTemplate:
    metadata:
      labels:
        {{- include "onerec.podLabels" $ctx | nindent 8 }}
    spec:
      {{- include "onerec.pod" $ctx | nindent 6 }}
      restartPolicy: Never
      containers:
        - name: ray-job-submitter
          {{- include "onerec.container" (dict "root" . "name" "train") | nindent 10 }}
          env:
            - {name: HOME, value: /tmp}
          resources:
            requests: {cpu: 100m, memory: 256Mi}
            limits: {memory: 1Gi}
          volumeMounts:
            - {name: tmp, mountPath: /tmp}
      volumes:
        - name: tmp
          emptyDir: {}
  rayClusterSpec:
    rayVersion: {{ $training.rayVersion | quote }}
    headGroupSpec:
      rayStartParams:
        # The head drives; work goes to the workers.
        num-cpus: "0"
        dashboard-host: 0.0.0.0
      template:
        metadata:
          labels:
            {{- include "onerec.podLabels" $ctx | nindent 12 }}
        spec:
          {{- include "onerec.pod" $ctx | nindent 10 }}
          {{- with include "onerec.placement" (dict "root" . "component" "training" "at" (merge $priority (deepCopy $training.head))) | trim }}
          {{- . | nindent 10 }}
          {{- end }}
          containers:
            {{- include "onerec.ray.container" (dict "root" . "node" "head" "resources" $training.head.resources) | nindent 12 }}
          volumes:
            {{- include "onerec.ray.volumes" (dict "root" . "shm" "4Gi") | nindent 12 }}
    workerGroupSpecs:
      - groupName: workers
        replicas: {{ $training.workers.replicas }}
        minReplicas: {{ $training.workers.replicas }}
        maxReplicas: {{ $training.workers.replicas }}
        rayStartParams: {}
        template:
          metadata:
            labels:
              {{- include "onerec.podLabels" $ctx | nindent 14 }}
          spec:
            {{- include "onerec.pod" $ctx | nindent 12 }}
            {{- with include "onerec.placement" (dict "root" . "component" "training" "at" (merge $priority (deepCopy $training.workers))) | trim }}
            {{- . | nindent 12 }}
            {{- end }}
            containers:
              {{- include "onerec.ray.container" (dict "root" . "node" "worker" "resources" $training.workers.resources "gpu" $training.workers.gpu) | nindent 14 }}
            volumes:
              {{- include "onerec.ray.volumes" (dict "root" . "shm" $training.workers.sharedMemory) | nindent 14 }}
{{- end -}}
