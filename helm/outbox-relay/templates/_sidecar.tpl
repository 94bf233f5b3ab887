{{/*
The relay as a native sidecar in the pod of an application, for a chart that depends on this one with `mode: sidecar`:

    {{- $relay := index .Subcharts "outbox-relay" }}
    metadata:
      annotations:
        checksum/outbox-relay: {{ include "outbox-relay.configChecksum" $relay }}
    spec:
      enableServiceLinks: false
      initContainers:
        {{- include "outbox-relay.sidecar" $relay | nindent 8 }}
      volumes:
        {{- include "outbox-relay.volumes" $relay | nindent 8 }}

It starts before the application and stops after it, so that the last messages are published too. It has no readiness
probe: an outage of Kafka must not take the application out of service.
*/}}
{{- define "outbox-relay.sidecar" -}}
- name: outbox-relay
  restartPolicy: Always
  {{- include "outbox-relay.run" . | nindent 2 }}
{{- end }}
