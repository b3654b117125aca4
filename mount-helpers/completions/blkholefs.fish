# Completion of blkholefs(8) for fish.

# Whether the command is one of these. Without any: whether there is no command yet.
function __blkholefs_is
    set -l words (commandline -opc)
    if test (count $argv) -eq 0
        test (count $words) -eq 1
        return
    end
    test (count $words) -gt 1; and contains -- $words[2] $argv
end

# Prints paths that begin with the text: directories, regular files and block devices.
function __blkholefs_files --argument-names typed
    for path in $typed*
        if test -d $path
            echo $path/
        else if test -f $path -o -b $path
            echo $path
        end
    end
end

# Prints devices and images, and the names that udev knows devices by.
function __blkholefs_devices
    set -l typed (commandline -ct)
    set -l parts (string match -r '^(UUID|LABEL|PARTUUID|PARTLABEL)=' -- $typed)
    if test (count $parts) -eq 2
        for name in /dev/disk/by-(string lower $parts[2])/*
            # udev writes a space as \x20.
            printf '%s=%b\n' $parts[2] (path basename $name 2>/dev/null; or basename $name)
        end
        return
    end
    __blkholefs_files (string replace -r '^~(?=/)' $HOME -- $typed)
    string join \n UUID= LABEL= PARTUUID= PARTLABEL=
end

# Prints the directories where blkholefs has mounted something.
function __blkholefs_mounted
    while read -l line
        set -l fields (string split ' ' -- $line)
        # The kernel writes a space as \040. As \0040, because an escape that begins with 0 may have four digits.
        test "$fields[3]" = fuse.blkholefs; and printf '%b\n' (string replace -ra '\\\\([0-7]{3})' '\\\\0$1' -- $fields[2])
    end </proc/mounts
end

# Prints the options after -o, which are a list with commas.
function __blkholefs_options
    set -l typed (string replace -r '^-o' '' -- (commandline -ct))
    set -l before (string replace -r '[^,]*$' '' -- $typed)
    set -l item (string replace -r '^.*,' '' -- $typed)
    set -l format (string replace -a % %% -- $before)%s
    switch $item
        case 'since=*' 'thin_metadata=*' 'backing=*'
            set -l parts (string split -m 1 = -- $item)
            for path in (__blkholefs_files $parts[2])
                echo $before$parts[1]=$path
            end
        case 'cluster_size=*'
            printf $format'\n' cluster_size={4K,8K,16K,32K,64K,128K,256K,512K,1M,2M}
        case '*=*'
        case '*'
            printf $format'\t%s\n' \
                backing= 'backing file of an image of changes' \
                cluster_size= 'cluster size of images' \
                compact 'compact image, qcow2' \
                nbd= 'export that an NBD device is connected to' \
                since= 'what changed since an older snapshot' \
                thin_metadata= 'metadata of a thin pool that is not active' \
                used 'free space of the file system as holes'
            __blkholefs_is mount; and printf $format'\t%s\n' \
                allow_other 'other users see the mount' \
                direct_io 'the kernel keeps no pages of files' \
                gid= 'group of files' \
                map_cache= 'memory for maps' \
                max_read= 'largest read' \
                mode= 'permissions of files' \
                name= 'name of the file' \
                nofail 'a missing device is no error' \
                queue_depth= 'reads in progress' \
                read_ahead= 'memory for reading ahead' \
                static 'nobody writes to the devices' \
                uid= 'owner of files' \
                umask= 'permissions that files lack' \
                writable 'files can be written; for fstab' \
                ro 'no writing' \
                rw 'files can be written' \
                exec 'programs can be run' \
                noexec 'no programs can be run' \
                suid 'obey set-user-ID bits' \
                nosuid 'ignore set-user-ID bits' \
                dev 'device nodes work' \
                nodev 'device nodes do not work' \
                sync 'writes wait for the device' \
                async 'writes do not wait'
    end
end

complete -c blkholefs -f
complete -c blkholefs -s h -l help -d 'Print the usage'
complete -c blkholefs -s V -l version -d 'Print the version'

complete -c blkholefs -n __blkholefs_is -a mount -d 'Show devices as files with holes'
complete -c blkholefs -n __blkholefs_is -a umount -d 'Unmount, and wait until the device is closed'
complete -c blkholefs -n __blkholefs_is -a map -d 'Print the data and holes of devices'
complete -c blkholefs -n __blkholefs_is -a info -d 'Print the layers of devices'
complete -c blkholefs -n __blkholefs_is -a verify -d 'Read the holes and compare them with zeros'
complete -c blkholefs -n __blkholefs_is -a status -d 'Print the mounts of this machine'
complete -c blkholefs -n __blkholefs_is -a demo -d 'Mount and copy a sparse image'

complete -c blkholefs -n '__blkholefs_is mount' -s f -l foreground -d 'Serve in the foreground'
complete -c blkholefs -n '__blkholefs_is mount umount' -s v -d 'Print what is done'
complete -c blkholefs -n '__blkholefs_is umount' -s f -d 'Abort requests without an answer'
complete -c blkholefs -n '__blkholefs_is umount' -s l -d 'Detach a mount that is in use'
complete -c blkholefs -n '__blkholefs_is mount map info verify' -s o -x -a '(__blkholefs_options)' -d Options
complete -c blkholefs -n '__blkholefs_is map info verify' -l volume -x -d 'Volume of a thin pool that is not active'
complete -c blkholefs -n '__blkholefs_is map info status' -l json -d 'Print JSON'

complete -c blkholefs -n '__blkholefs_is map' -l totals -d 'Print only the sums'
complete -c blkholefs -n '__blkholefs_is map' -l picture -d 'Draw a grid of blocks'
complete -c blkholefs -n '__blkholefs_is map' -l ascii -d 'Draw with plain ASCII characters'
complete -c blkholefs -n '__blkholefs_is map' -l svg -r -F -d 'Draw into a file'
complete -c blkholefs -n '__blkholefs_is map' -l format -x -a 'borg bmap ddrescue csi' -d 'Print the map of another program'
complete -c blkholefs -n '__blkholefs_is map' -l since -r -F -d 'Print what changed since an older snapshot'
complete -c blkholefs -n '__blkholefs_is map' -l offset -x -d 'Begin at a byte'
complete -c blkholefs -n '__blkholefs_is map' -l length -x -d 'Bytes of the range'

complete -c blkholefs -n '__blkholefs_is verify' -l sample -x -d 'Read pieces that are chosen at random'
complete -c blkholefs -n '__blkholefs_is verify' -l seed -x -d 'Choose the same pieces as before'
complete -c blkholefs -n '__blkholefs_is verify' -l against -r -F -d 'Compare a copy'

complete -c blkholefs -n '__blkholefs_is mount map info verify' -a '(__blkholefs_devices)'
complete -c blkholefs -n '__blkholefs_is umount status' -a '(__blkholefs_mounted)' -d Mountpoint
